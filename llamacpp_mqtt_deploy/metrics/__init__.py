"""What monitoring reads of a worker: the metrics, a small HTTP listener for them, and a file for node-exporter."""
