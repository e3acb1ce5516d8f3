"""How a kernel starts: settings, backend, device, launch, scratch, clusters, tuned configurations."""
