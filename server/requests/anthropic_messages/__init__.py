"""Anthropic's Messages over the same request as chats: content blocks in, content blocks and named events out.

    body → conversation (a ChatBody) → requests.chat.Chat → chunks → events → the message

https://docs.anthropic.com/en/api/messages. Left out, and refused by name: images, documents that are no text, and a
conversation that ends with the assistant's turn. Tools that Anthropic runs itself are skipped.
"""
