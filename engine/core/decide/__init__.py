"""What is decided: the questions a policy is asked, its candidates, their features and the outlook."""
