"""Doubles of the adapters that behave like the real ones: a broker and a link in this process, and an engine that plays scripts."""
