"""Benchmarks: `tilewright bench NAME` runs bench_NAME.py, an operator or a model, through run.py.

A bench_<name>.py is data and functions; the runner owns check, time and table:

    CASES        name -> the case: axes and options by name; "modes" and "dtypes" say what is run
    VARIANTS     name -> `Variant`: ours and each baseline; "tilewright" is the one that is compared
    GRADIENTS    names of the inputs that get a gradient in mode "fwd+bwd"
    make_inputs(case, dtype, device)   -> the inputs by name, the same for all variants
    work(case, itemsize, mode)         -> what the formula needs at least: (operations, bytes)
    small(case)                        -> the case in a shape that the float64 reference can do
    truth(case, **inputs)              -> the output in float64, differentiable
    stock(case, **inputs)              -> plain torch in the inputs' dtype: the yardstick of errors

and, where there is something to say:

    why_not()                          -> what is missing here and how to get it, or None
    quick(case)                        -> the case in the shape that --quick times
    multiplied(case, dtype)            -> the dtype of the products that bound it
    counts(case)                       -> what one call gets through, by unit, the same units in all
                                          cases: shown for a second

gpu_check.sh runs every gpu_<name>.py, and its head says what that holds.
"""
