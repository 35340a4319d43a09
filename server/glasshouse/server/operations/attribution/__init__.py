"""Attribution as work for a server: lanes beside generation, estimates, stored results."""
