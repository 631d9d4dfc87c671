"""The frozen teacher on a CUDA device. Importing these modules needs torch; running them needs CuPy and a GPU."""
