"""What `lmd demo` is made of: its processes of processes, its brokers, its worker. The terminal's part is in commands/."""
