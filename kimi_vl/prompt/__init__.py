"""Messages and pictures → model inputs."""
