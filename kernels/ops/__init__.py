"""Operations of a model, each a PyTorch reference and a Triton kernel under one signature.

    x.py           the op: its documentation, and the reference, which is what runs on a CPU
    x_triton.py    its kernel, imported when the first tensor of a GPU comes
    pair.py        joins the two and picks by device, which nothing else does

`attend_triton.py` and `decode_triton.py` are the kernels of all attentions, for many queries of a sequence and for one,
and `decode_tiles.py` says how the latter is cut; on Hopper GPUs `hopper_launch.py` takes the place of the former for
many queries whose heads have 128 values, in Gluon (`hopper_triton.py`, `hopper_load_triton.py`). `gemv_triton.py`,
`keep_triton.py` and `skinny_triton.py` are those of `linear` for few rows, with weights of 8 bits read by
`narrow_triton.py`; for more it calls cuBLAS, of fp8 as `fp8_launch.py` says. `gemv_two_triton.py` are those of two
products in one launch (`linears.py`), which `keep_triton.py` computes too. Of `sampling` only the choice has a kernel,
whose parts are `edges_triton.py` and `draw_triton.py`. The rest is what kernels share.

A kernel computes in float32 and rounds at the edge, takes any shape, and reads nothing that is masked: what is not a
number stays where it is. Tile sizes are fixed in a table at the top of each file, with the reason, those of `linear`
stored for each GPU (`headrace.kernels.tuning`); nothing is tuned at start. What changes from step to step (lengths,
splits, strides of tables) is no reason to compile again: a kernel is compiled once for each kind of layer, products for
each bucket of rows, experts for few tokens and for many, and attention for few queries of prompts, for many and for
more, for few decodes, for some, for many, and for as many that contexts need not be split. Nothing waits for the
device, and launches go to the current one.
"""
