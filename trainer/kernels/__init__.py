"""CUDA C++ sources, compiled at run time by ``q4kd.trainer.cuda.compile``. No Python here: a package so they install."""
