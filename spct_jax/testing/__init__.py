"""Stand-ins and tiny models that the tests share; nothing else imports this."""
