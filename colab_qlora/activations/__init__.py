"""What a training step has to remember, what it costs to remember or to compute again, and plans.

model_shape.py        the sizes of a model, from its config; recorded_shapes.py: of known models
cost_settings.py      how the step runs, as far as costs depend on it
costs.py              bytes and FLOPs of every tensor that a layer can keep
saved_classes.py      these tensors in the classes that a plan decides about
static_costs.py       bytes that do not depend on the batch: weights, adapters, optimiser states
scratch_costs.py      bytes of the memory that all layers share
phase_costs.py        bytes that come and go in each phase of a step, and its peak
gpu_profile.py        rates of a GPU: recorded_profiles.py, or measure_profile.py on the GPU itself
gpu_timer.py          seconds of calls whatever the host does; copy_rates.py: of copies
profile_cache.py      measured rates on disk
step_time.py          seconds of a step and its parts, from costs and rates
plan.py, planner.py   which tensors to keep, to offload and to recompute; offload_sets.py
step_plan.py          the plan of a step; step_search.py: by real costs and the true peak
recording.py          whether its layers may run as CUDA graphs, and what that costs
step_settings.py      how a step may run: chunks, decoded weights, where the embedding is
memory_plan.py        the face: does it fit, how long, what would help; report.py: in words
this_machine.py       the memory that is free now
runtime.py            plans each batch of a model and hands its layers their stores
host_pool.py, stores.py   page-locked host memory, and what travels there and back
"""
