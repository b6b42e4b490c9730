"""Long Range Arena: one model a task, trained from scratch with each kind of attention, and the table of all runs."""
