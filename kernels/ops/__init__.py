"""Operations of a model, each a PyTorch reference and a Triton kernel under one signature.

    x.py           the op: its documentation, and the reference, which is what runs on a CPU
    x_triton.py    its kernel, imported when the first tensor of a GPU comes
    pair.py        joins the two and picks by device, which nothing else does

`attend_triton.py` is the kernel of both attentions, `edges_triton.py` and `draw_triton.py` are parts of sampling's, and
`math_triton.py` is what kernels share. `linear` leaves a GPU to cuBLAS, and of `sampling` only the choice has a kernel;
the rest of both runs anywhere.

A kernel computes in float32 and rounds at the edge, takes any shape, and reads nothing that is masked: what is not a
number stays where it is. Tile sizes are fixed in a table at the top of each file, with the reason; nothing is tuned at
start. What changes from step to step (lengths, splits, strides of tables) is no reason to compile again: a kernel is
compiled once for each kind of layer, experts for few tokens and for many, and attention for prompts, decodes and
decodes whose contexts are split. Nothing waits for the device, and launches go to the current one.
"""
