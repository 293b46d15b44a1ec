"""Webhooks: events told to addresses that tenants registered, as Standard Webhooks has it (docs/webhooks.md).

``addresses`` says where motet may connect to, ``telling`` what is sent, ``posting`` sends it, ``deliverer`` decides when.
"""
