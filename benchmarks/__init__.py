"""Timings of every op, of a training step and of the loader, on one harness: see harness.py and report.py."""
