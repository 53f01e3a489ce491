"""The attacks: settings, methods, and the two loops."""
