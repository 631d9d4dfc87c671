"""CUDA C++ sources, compiled at run time by ``q4kd.trainer.kernels.compile``; a package, so that they are installed."""
