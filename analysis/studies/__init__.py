"""Studies without training, one module each: `study(...)` computes what `kexue study NAME` prints and draws."""
