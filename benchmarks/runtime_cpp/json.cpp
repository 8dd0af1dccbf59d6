// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmath>

#include "error.h"

namespace {

std::string quoted(const std::string& string) {
    std::string text = "\"";
    for (const char c : string) {
        char escaped[8];
        if (static_cast<unsigned char>(c) < 0x20) {
            snprintf(escaped, sizeof escaped, "\\u%04x", c);
            text += escaped;
            continue;
        }
        if (c == '"' || c == '\\') text += '\\';
        text += c;
    }
    return text + '"';
}

// The parts on lines of their own, moved in by one.
std::string lines(char open, const std::vector<std::string>& parts, char close) {
    std::string text(1, open);
    for (size_t i = 0; i < parts.size(); ++i) {
        text += i == 0 ? "\n " : ",\n ";
        for (const char c : parts[i]) {
            text += c;
            if (c == '\n') text += ' ';
        }
    }
    return text + (parts.empty() ? "" : "\n") + close;
}

}  // namespace

Json::Json(double number) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", number);
    text_ = std::isfinite(number) ? text : "null";
}

Json::Json(const std::string& string) : text_(quoted(string)) {}

Json Json::array(const std::vector<Json>& items) {
    std::vector<std::string> parts;
    for (const Json& item : items) parts.push_back(item.text_);
    return Json(Raw{}, lines('[', parts, ']'));
}

Json Json::object(const std::vector<std::pair<std::string, Json>>& fields) {
    std::vector<std::string> parts;
    for (const auto& [name, value] : fields) parts.push_back(quoted(name) + ": " + value.text_);
    return Json(Raw{}, lines('{', parts, '}'));
}

void check_writable(const std::string& path) {
    const size_t slash = path.find_last_of('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    if (access(folder.c_str(), W_OK) != 0)
        throw UsageError("--json " + path + ": the folder " + folder + ": " + strerror(errno));
}

void write_file(const std::string& path, const std::string& text) {
    const std::string aside = path + "." + std::to_string(getpid());
    FILE* const file = fopen(aside.c_str(), "wb");
    bool is_whole = file != nullptr && fwrite(text.data(), 1, text.size(), file) == text.size();
    is_whole = file != nullptr && fclose(file) == 0 && is_whole;
    if (is_whole && rename(aside.c_str(), path.c_str()) == 0) return;
    const std::string reason = strerror(errno);
    unlink(aside.c_str());
    throw Error("--json " + path + ": cannot be written: " + reason);
}
