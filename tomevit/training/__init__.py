"""What a training needs to know: parameter groups, and how published weights were trained."""
