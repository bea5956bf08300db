"""The engine for CUDA GPUs: the reference's answers, close to the speed of the memory."""
