"""PPO on the scoring network: learner, policy, buffer, objective, callbacks."""
