"""The serving runtime: the process that KServe and `haechi serve` start."""
