"""From an API call to a picture: samplers, recipes, the model store, the planner, pipelines."""
