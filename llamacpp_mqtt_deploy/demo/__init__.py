"""What `lmd demo` is made of: its household of processes, its brokers, its worker. The terminal's part is in commands/."""
