"""Machine code (SASS) read: what it holds, and how often a program of a launch executes it."""
