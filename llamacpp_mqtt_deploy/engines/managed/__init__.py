"""The engine that the worker starts and supervises: a llama.cpp server as a child process."""
