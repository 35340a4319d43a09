"""What client and server both need to speak the protocol: tensor packing, limits, error reasons."""
