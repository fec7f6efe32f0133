"""What `lmd check` tries: broker, permissions, engine and machine; each finding says what to do where something is wrong."""
