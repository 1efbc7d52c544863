"""What a training needs to know: images, parameter groups, and how published weights were trained."""
