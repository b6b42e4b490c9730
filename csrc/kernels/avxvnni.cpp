#define TOPK_TARGET avxvnni
#define TOPK_TARGET_NAME "avxvnni"
#define TOPK_SCREENS
#include "target.h"
