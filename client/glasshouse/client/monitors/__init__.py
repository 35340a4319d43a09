"""Monitors: what watches live generations, and what it noticed."""
