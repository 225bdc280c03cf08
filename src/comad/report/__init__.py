"""What people see of a run: a page, figures."""
