// ArduinoJson 7 as far as the sketch uses it: the members of one object, and what they give when they are missing.
#pragma once
#include <cstdlib>
#include <map>
#include <string>

class JsonVariant {
 public:
  JsonVariant &operator=(const std::string &text) {
    kind_ = TEXT;
    text_ = text;
    return *this;
  }
  template <typename T>
  bool is() const;
  operator const char *() const { return kind_ == TEXT ? text_.c_str() : nullptr; }
  const char *operator|(const char *otherwise) const { return kind_ == TEXT ? text_.c_str() : otherwise; }
  long operator|(long otherwise) const { return kind_ == NUMBER ? number_ : otherwise; }
  bool operator|(bool otherwise) const { return kind_ == BOOL ? number_ != 0 : otherwise; }

 private:
  friend class JsonDocument;
  enum Kind { NOTHING, TEXT, NUMBER, BOOL, OTHER } kind_ = NOTHING;
  std::string text_;
  long number_ = 0;
};

template <>
inline bool JsonVariant::is<const char *>() const {
  return kind_ == TEXT;
}

class JsonDocument {
 public:
  JsonVariant &operator[](const char *name) { return members_[name]; }

  void write(std::string &out) const {
    out = "{";
    for (const auto &member : members_) {
      if (out.size() > 1) out += ',';
      out += quoted(member.first) + ":" + quoted(member.second.text_);
    }
    out += "}";
  }

  // False when the text is no JSON object.
  bool read(const std::string &text) {
    at_ = text.c_str();
    members_.clear();
    if (*at_ != '{') return false;
    for (at_++; *at_ && *at_ != '}';) {
      if (*at_ == ',') at_++;
      std::string name;
      if (!string(name) || *at_++ != ':' || !value(members_[name])) return false;
    }
    return *at_ == '}';
  }

 private:
  std::map<std::string, JsonVariant> members_;
  const char *at_ = nullptr;

  static std::string quoted(const std::string &text) {
    std::string out = "\"";
    for (char one : text) {
      if (one == '"' || one == '\\') out += '\\';
      out += one;
    }
    return out + "\"";
  }

  bool value(JsonVariant &into) {
    if (*at_ == '"') {
      into.kind_ = JsonVariant::TEXT;
      return string(into.text_);
    }
    if (*at_ == '{' || *at_ == '[') {
      into.kind_ = JsonVariant::OTHER;
      return nested();
    }
    std::string word;
    while (*at_ && !strchr(",}]", *at_)) word += *at_++;
    into.kind_ = word == "null" ? JsonVariant::NOTHING : word == "true" || word == "false" ? JsonVariant::BOOL : JsonVariant::NUMBER;
    into.number_ = word == "true" ? 1 : atol(word.c_str());
    return !word.empty();
  }

  bool nested() {
    int depth = 0;
    std::string ignored;
    do {
      if (*at_ == '"') {
        if (!string(ignored)) return false;
        continue;
      }
      if (*at_ == '{' || *at_ == '[') depth++;
      if (*at_ == '}' || *at_ == ']') depth--;
      if (!*at_++) return false;
    } while (depth);
    return true;
  }

  bool string(std::string &into) {
    into.clear();
    if (*at_++ != '"') return false;
    while (*at_ != '"') {
      if (!*at_) return false;
      if (*at_ != '\\') into += *at_++;
      else if (!escape(into)) return false;
    }
    at_++;
    return true;
  }

  // The worker writes UTF-8 as it is and escapes control characters alone.
  bool escape(std::string &into) {
    static const std::map<char, char> SHORT = {{'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'b', '\b'}, {'f', '\f'}};
    char kind = at_[1];
    if (kind == 'u') {
      into += static_cast<char>(strtol(std::string(at_ + 2, 4).c_str(), nullptr, 16));
      at_ += 6;
      return true;
    }
    auto found = SHORT.find(kind);
    into += found == SHORT.end() ? kind : found->second;
    at_ += 2;
    return kind != 0;
  }
};

inline void serializeJson(const JsonDocument &document, std::string &out) { document.write(out); }
inline bool deserializeJson(JsonDocument &document, const unsigned char *bytes, unsigned length) {
  return !document.read(std::string(reinterpret_cast<const char *>(bytes), length));  // true is an error, as in the library
}
