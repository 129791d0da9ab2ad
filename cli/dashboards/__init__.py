"""Views of runs: one page of HTML for a run, and workspaces of W&B for families of experiments."""
