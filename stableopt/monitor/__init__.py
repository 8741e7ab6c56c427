"""`StabilityMonitor`: measures stability margins during training and sends them to sinks."""
