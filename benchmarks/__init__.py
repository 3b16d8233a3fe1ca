"""What a claim of speed rests on: `headrace bench`. Ours beside peers and the physical limit, on the same shapes.

shapes       models by name, with random weights; a model folder or id will do as well
published    figures that others were measured with elsewhere, and our goals
costs        bytes and operations of a step, a prompt, a text; ceilings measures what the device can do
measure      what is timed and what it is worth: decode, latency, prefill, throughput, encode, each in its file
metrics      quantiles, and the times of a served request by vLLM's definitions
worker       a child process that answers orders, and its parent's side; surveyor and the subjects are such
subject      who is measured: ours is the engine, peers are the others
comparison   runs cases over subjects, in rounds
serving      a pool as `headrace up` starts it, under load from load; openai_stream reads an HTTP endpoint
startup      from a fresh process to the first token; everything remakes the table of all of it
traces       what the kernels of a step took
report       rows as a table and as JSON, which plots makes into pictures
tune         the tiles of products on this GPU, which kernels/tuned stores; a command of its own, which tries what
             tune_ways knows and whose second half is tune_layers
broker       tokens through one broker process, with the processes of echo around it

Importing any of these imports neither torch nor transformers; that is for the child processes.
"""
