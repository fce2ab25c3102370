"""What is measured with: model files and texts."""
