"""What a request sees of the forward pass: captured at the site, finished after it."""
