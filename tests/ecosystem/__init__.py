"""Tests with other libraries; a package, so that its conftest.py is another module than that of tests/."""
