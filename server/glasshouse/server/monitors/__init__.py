"""Monitors: probes and features scored on live requests, what they noticed, and whom it is told."""
