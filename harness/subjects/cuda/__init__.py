"""The CUDA teacher: parity, memory, utilisation, time, and the allocator of unified devices."""
