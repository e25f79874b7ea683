"""What several rules share: pools, planners, forecasts, slack, layouts."""
