"""What a network costs, said before it is trained: counts, memory, plans; `studies` are run by `kexue study`."""
