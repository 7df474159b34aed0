"""Ratios against a named baseline, measured in one run: `python -m benchmarks.find`, or all of them: `python -m benchmarks`."""

import refusal_core as refusal_core  # before torch: it says how the threads of torch wait for each other
