"""Studies of a finished run or a PM: one folder each, with settings, analysis, result and page."""
