"""The pages and plots of a comparison."""
