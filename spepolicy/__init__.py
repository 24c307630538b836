"""Statistical Profiling Extension policies for KVM, tried before they are written."""
