"""OpenAI's Responses over the same request as chats: items in, items and named events out.

    body → conversation (a ChatBody) → requests.chat.Chat → chunks → events → the response

https://platform.openai.com/docs/api-reference/responses. Left out, and refused by name: background runs, OpenAI's own
conversations and prompt templates. Tools that OpenAI runs itself are skipped, since agents name them by default.
"""
