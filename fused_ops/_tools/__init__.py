"""What answers questions about an installation and its kernels: doctor, explain, audit, tune."""
