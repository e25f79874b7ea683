"""How kernels are compiled and kept, and the record arrays that they work on."""
