"""Width studies: coordinate checks, transfer, sweeps."""
